"""Run an unmodified official script under this plugin: `python tools/host.py run --host=stylegan2-ada-pytorch generate.py --network=x.pkl ...`."""

from m2m_stylegan.host import main

if __name__ == '__main__':
    main()
