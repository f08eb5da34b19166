from stepdistill.cli import main

main()
