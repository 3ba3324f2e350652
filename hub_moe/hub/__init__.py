"""The client side of collaboration: what moves between people's Hubs. Never imports torch."""
