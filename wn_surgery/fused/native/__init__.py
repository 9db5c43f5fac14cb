"""The compiled path, for the CPU. Nothing is built or loaded before somebody asks for it."""
