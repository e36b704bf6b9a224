from remote_vae.cli import main

main()
