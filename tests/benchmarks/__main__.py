"""`python -m tests.benchmarks`: every part of the benchmark, or the parts named, as one document.

One process measures at a time. Each part keeps its measurements in results/MACHINE/PART.json (with
--shape in PART-SHAPE.json), from which --print makes the document again.
"""

from tests.benchmarks import generate, levers, peers, products, scaling, startup, waiting
from tests.benchmarks.inputs import check
from tests.benchmarks.interleaved import check_names, measure, options, printed

MODULES = (peers, levers, generate, startup, waiting, scaling, products)
PARTS = {module.PART.name: module.PART for module in MODULES}


def main() -> None:
    """Measure, and print what there is."""
    parser = options("", __doc__)
    args = parser.parse_args()
    check_names(parser, args.names, PARTS)
    parts = [part for name, part in PARTS.items() if not args.names or name in args.names]
    if not args.print:
        if any(part.reads for part in parts):
            check(args.data)
        for part in parts:
            measure(part, args)
    print(printed(parts, args))


if __name__ == "__main__":
    main()
