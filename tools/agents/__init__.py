"""Programs that an administrator names in the ``handlers`` section: fencing, constraints, notifications."""
