"""A cluster of any size, simulated by discrete events, driven by the project's own planner and scheduler."""
