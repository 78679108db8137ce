"""Pictures, questions and scores that show what a preset costs."""
