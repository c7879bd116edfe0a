"""How good a model is: each task's predictions and scores."""
