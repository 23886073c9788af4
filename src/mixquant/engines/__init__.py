"""What schedules and runs a model: one module or package per engine; none knows another."""
