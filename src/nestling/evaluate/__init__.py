"""What a family is worth: tasks with verifiers, the figures of a run, and the report that shows them."""
