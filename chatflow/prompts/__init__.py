"""What is asked: templates, questions, answers."""
