"""``python -m services.instance --config FILE``: runs one instance until SIGTERM or SIGINT."""

from services.runtime.process import leave, loading

if __name__ == "__main__":
    with loading():
        from services.instance.entry import main
    leave(main())
