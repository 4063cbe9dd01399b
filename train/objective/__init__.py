"""What the model learns: tasks as data, rectified flow, sampling."""
