from benchmarks.loss.command import main

main()
