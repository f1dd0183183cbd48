"""What can be trained: one file a task, one row of `client.tasks.table.TASKS` each."""
