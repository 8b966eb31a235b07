from benchmarks.workspace.command import main

main()
