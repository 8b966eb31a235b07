from benchmarks.report.command import main

main()
