"""Where a run runs, in this process or on Ray Train workers, and what a machine lacks. Only here is Ray imported."""
