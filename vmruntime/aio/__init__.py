"""Owned processes, detached processes and blocking calls for asyncio."""
