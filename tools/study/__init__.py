"""Studies of what earns what, and the table of the Q-VLM paper."""
