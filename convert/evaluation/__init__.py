"""What `convert.evaluate` and `convert.select_layers` measure, draw and write."""
