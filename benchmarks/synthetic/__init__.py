"""The paper's synthetic experiment: how well output layers of small dimension match random distributions."""
