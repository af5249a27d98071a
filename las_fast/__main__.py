from las_fast.cli import main

main()
