from benchmarks.memory.command import main

main()
