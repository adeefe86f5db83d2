"""Who answers: models on the workers and behind services."""
