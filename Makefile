# Husk. `make` says what there is to make.

PREFIX ?= /usr/local
DESTDIR ?=
# `dist` optimises across crates: smaller, faster, and slower to build.
PROFILE ?= release
CARGO ?= cargo

export PATH := $(PATH):$(HOME)/.cargo/bin
# Over what a caller's own Cargo configuration says.
export CARGO_TARGET_DIR ?= $(CURDIR)/target
programs = target/$(PROFILE)
guest := target/guest
hosted := containerd-shim-husk-v2 husk husk-vmm
# The kernel and the crates are compiled side by side, where both are asked for.
guest_goals := guest demo test bench machine
built := $(if $(filter $(guest_goals),$(MAKECMDGOALS)),guest,programs) $(filter bench,$(MAKECMDGOALS))

.PHONY: help tools built build guest install uninstall demo test check fuzz bench machine clean

help:
	@echo 'make demo      build everything and run a container in a microVM'
	@echo 'make build     the programs of the host, in $(programs)'
	@echo 'make guest     the kernel and initial file system of the guest, in $(guest)'
	@echo 'make install   both, into PREFIX=$(PREFIX) (and settings into /etc/husk)'
	@echo 'make test      all tests'
	@echo 'make check     format, lints, documentation, scripts, spelling, dependencies'
	@echo 'make fuzz      what hostile guests, agents and files may hold, SECONDS=60 for each target'
	@echo 'make bench     benchmarks, beside QEMU and runc'
	@echo 'make machine   a shell in the test machine'

tools:
	@# By name of the shell: on a file system mounted with noexec it says so.
	@bash configuration/preflight $(MAKECMDGOALS)
	@configuration/step packages configuration/guest/install-packages configuration/packages \
	    $(if $(filter guest,$(built)),configuration/guest/packages)
	@configuration/step rust configuration/install-rust

built: tools
	@PROFILE='$(PROFILE)' CARGO='$(CARGO)' configuration/build $(built)

build guest: built

# Copies only: what is to be installed has been built before, as another user perhaps.
install:
	@for file in $(addprefix $(programs)/,$(hosted)) $(guest)/vmlinux $(guest)/initrd.img; do \
	    [ -e "$$file" ] || { echo "install: $$file is missing; run \`make build guest\` first" >&2; exit 1; }; \
	done
	install -d '$(DESTDIR)$(PREFIX)/bin' '$(DESTDIR)$(PREFIX)/lib/husk' '$(DESTDIR)/etc/husk'
	install -m 755 $(addprefix $(programs)/,$(hosted)) '$(DESTDIR)$(PREFIX)/bin'
	install -m 644 $(guest)/vmlinux $(guest)/initrd.img '$(DESTDIR)$(PREFIX)/lib/husk'
	@# Settings that someone has changed stay; the shipped ones name where things were put.
	@if [ -e '$(DESTDIR)/etc/husk/husk.toml' ]; then \
	    echo 'install: /etc/husk/husk.toml is there already and stays as it is'; \
	else \
	    sed 's|^#\(.*"\)/usr/local/|\1$(PREFIX)/|' configuration/husk.toml >'$(DESTDIR)/etc/husk/husk.toml'; \
	    echo 'install: /etc/husk/husk.toml'; \
	fi

uninstall:
	@for file in $(hosted); do rm -f '$(DESTDIR)$(PREFIX)/bin/'"$$file"; done
	rm -rf '$(DESTDIR)$(PREFIX)/lib/husk'

demo: build guest
	@HUSK_BIN="$$PWD/$(programs)" tests/demo/run

test: build guest
	@tests/run

check: build
	@tests/check/run

fuzz: tools
	@tests/fuzz/run $(SECONDS)

# What is measured is what is installed where it counts.
bench: PROFILE = dist
bench: build guest
	@HUSK_BIN="$$PWD/$(programs)" tests/bench/run

machine: build guest
	@tests/machine/run

clean:
	$(CARGO) clean
