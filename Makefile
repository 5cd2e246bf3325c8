# Husk. `make` says what there is to make.

PREFIX ?= /usr/local
DESTDIR ?=
# `dist` optimises across crates: smaller, faster, and slower to build.
PROFILE ?= release
CARGO ?= cargo

export PATH := $(PATH):$(HOME)/.cargo/bin
programs = target/$(PROFILE)
guest := target/guest
static := x86_64-unknown-linux-gnu
hosted := containerd-shim-husk-v2 husk husk-vmm

.PHONY: help tools build vmm guest install uninstall demo test check fuzz bench machine clean

help:
	@echo 'make demo      build everything and run a container in a microVM'
	@echo 'make build     the programs of the host, in $(programs)'
	@echo 'make guest     the kernel and initial file system of the guest, in $(guest)'
	@echo 'make install   both, into PREFIX=$(PREFIX) (and settings into /etc/husk)'
	@echo 'make test      all tests'
	@echo 'make check     format, lints, licences'
	@echo 'make fuzz      what hostile guests, agents and files may hold, SECONDS=60 for each target'
	@echo 'make bench     benchmarks, beside QEMU and runc'
	@echo 'make machine   a shell in the test machine'

tools:
	@configuration/guest/install-packages configuration/packages
	@configuration/install-rust

build: tools vmm
	@echo 'build: the programs of the host'
	$(CARGO) build --locked --profile $(PROFILE) -p husk-shim -p husk-runtime --bins

vmm: tools
	@echo 'build: the virtual machine monitor'
	@# Static: it starts sooner, and needs no file but its own.
	RUSTFLAGS="$$RUSTFLAGS -C target-feature=+crt-static" \
	    $(CARGO) build --locked --profile $(PROFILE) --target $(static) -p husk-vmm --bins
	@install -C -m 755 target/$(static)/$(PROFILE)/husk-vmm $(programs)/husk-vmm

guest: tools
	@echo 'guest: the kernel (some minutes, once)'
	@configuration/guest/build-kernel $(guest)/vmlinux
	@echo 'guest: the agent'
	@agent=$$(agent/build) && configuration/guest/build-initrd "$$agent" $(guest)/initrd.img

# Copies only: what is to be installed has been built before, as another user perhaps.
install:
	@for file in $(addprefix $(programs)/,$(hosted)) $(guest)/vmlinux $(guest)/initrd.img; do \
	    [ -e "$$file" ] || { echo "install: $$file is missing; run \`make build guest\` first" >&2; exit 1; }; \
	done
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/husk $(DESTDIR)/etc/husk
	install -m 755 $(addprefix $(programs)/,$(hosted)) $(DESTDIR)$(PREFIX)/bin
	install -m 644 $(guest)/vmlinux $(guest)/initrd.img $(DESTDIR)$(PREFIX)/lib/husk
	@# Settings that someone has changed stay; the shipped ones name where things were put.
	@if [ -e $(DESTDIR)/etc/husk/husk.toml ]; then \
	    echo 'install: /etc/husk/husk.toml is there already and stays as it is'; \
	else \
	    sed 's|^#\(.*"\)/usr/local/|\1$(PREFIX)/|' configuration/husk.toml >$(DESTDIR)/etc/husk/husk.toml; \
	    echo 'install: /etc/husk/husk.toml'; \
	fi

uninstall:
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,$(hosted))
	rm -rf $(DESTDIR)$(PREFIX)/lib/husk

demo: build guest
	@HUSK_BIN=$(CURDIR)/$(programs) tests/demo/run

test: build guest
	@tests/run

check: vmm
	@tests/check/run

fuzz: tools
	@tests/fuzz/run $(SECONDS)

# What is measured is what is installed where it counts.
bench: PROFILE = dist
bench: build guest
	$(CARGO) build --locked --profile $(PROFILE) -p husk-bench
	RUSTFLAGS="$$RUSTFLAGS -C target-feature=+crt-static" \
	    $(CARGO) build --locked --profile $(PROFILE) --target $(static) -p husk-vmm --bins --features unjailed
	@install -C -m 755 target/$(static)/$(PROFILE)/husk-vmm $(programs)/husk-vmm-unjailed
	@HUSK_BIN=$(CURDIR)/$(programs) tests/bench/run

machine: build guest
	@tests/machine/run

clean:
	$(CARGO) clean
