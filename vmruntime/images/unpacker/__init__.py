"""The program that turns a layer's blob into its EROFS image: a process of its own, without privileges.

It imports the standard library and vmruntime.errors alone, so that it starts fast and there is little in it to attack.
"""
