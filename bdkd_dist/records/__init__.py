"""What is kept of a run: TensorBoard, metric lines, figures, per-sample predictions and results."""
