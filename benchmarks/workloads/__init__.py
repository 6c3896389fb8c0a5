"""What is measured. Each module has `run(stage)`, which adds its rounds to the stage's figures."""
