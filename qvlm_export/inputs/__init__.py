"""Pictures and prompts to model inputs."""
