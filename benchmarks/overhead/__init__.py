"""Time and memory of the loss and of the head, beside what there is otherwise."""
