"""``python -m bdkd_dist``: the command line where no script is on the path, as in a job on a cluster."""

from bdkd_dist.cli import main

if __name__ == "__main__":
    main()
