from lorank.cli import main

main()
