"""The stages that train a converted checkpoint against its teacher: what they share, and each one's own loop."""
