"""The QEMU guest agent: what guests that have none of our agents can be asked (QEMU Guest Agent Protocol Reference)."""
