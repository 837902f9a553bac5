"""The client of the guest agent."""
