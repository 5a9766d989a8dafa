"""Making an elastic checkpoint: pretraining a parent, ranking its parts, the router, elastic distillation."""
