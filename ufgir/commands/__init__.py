"""One module per subcommand of `ufgir`: its HELP, `configure` and `run`."""
