from benchmarks.step.command import main

main()
