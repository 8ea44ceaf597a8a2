"""What an administrator sees: the commands, the daemon, the configuration, the offline metadata tool."""
