"""Floor 7: the `dspark` command, one thin command per file; heavy imports wait until a command runs."""
