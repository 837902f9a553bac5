"""Pods that are one machine, booted from a disk image as it is, and what stands in for a guest agent of ours."""
