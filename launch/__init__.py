"""Starting: ranks on this machine, and the check that an installation can train."""
