"""What a model is made of, without a tensor library: axes, the table, values, costs."""
