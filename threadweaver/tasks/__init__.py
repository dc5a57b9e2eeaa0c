"""Where prompts and answers come from. One module a task."""
