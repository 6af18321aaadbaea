"""The main job from end to end on a small scale: a softmax model in, a linear-attention model out."""
