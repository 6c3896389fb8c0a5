"""What is measured. Each module has `run(stage)`, which adds its rounds to the stage's figures.

Where one task gets one thing after the other, a round's figure is the median of its gets: what the machine does besides
in the middle of one says nothing about the others.
"""
