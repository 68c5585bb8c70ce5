"""How good a model's answers are when its cache is compressed: the evaluations behind `mustafar eval`."""
