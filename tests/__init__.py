"""The suite; ``python -m tests.launch MODE`` runs it in one patching mode."""
