"use strict";
// Draws code maps when they come into view, filters the gallery, and explores which positions share a code.
// Texts reach the page through textContent and attributes only.
(() => {
  const OTHERS = 24, PATCH = 64;

  function bytesOf(text) {
    const letters = atob(text), bytes = new Uint8Array(letters.length);
    for (let at = 0; at < letters.length; at++) bytes[at] = letters.charCodeAt(at);
    return bytes;
  }

  function make(name, properties, ...children) {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  }

  class Gallery {
    constructor(section) {
      const id = section.dataset.set;
      const decoding = document.getElementById(`${id}-decoding`);
      this.cards = [...section.querySelectorAll(".card")];
      this.codes = new Map();
      if (decoding) {
        const { grid, palettes, width } = JSON.parse(decoding.textContent);
        [this.rows, this.columns] = grid;
        this.palettes = palettes.map(bytesOf);
        this.width = width;
        this.depth = palettes.length;
        this.watch();
        section.addEventListener("click", (event) => {
          const button = event.target.closest(".explore");
          if (button) explorer.open(this, button.closest(".card"), button);
        });
      }
      this.search(section);
    }

    // The codes of a card, depth after depth at each position.
    codesOf(card) {
      if (!this.codes.has(card)) {
        const bytes = bytesOf(card.dataset.codes);
        this.codes.set(card, this.width === 2 ? new Uint16Array(bytes.buffer) : new Uint32Array(bytes.buffer));
      }
      return this.codes.get(card);
    }

    watch() {
      const seen = new IntersectionObserver((entries) => {
        for (const entry of entries) {
          if (!entry.isIntersecting) continue;
          seen.unobserve(entry.target);
          this.drawMaps(entry.target);
        }
      }, { rootMargin: "400px" });
      for (const card of this.cards) if (card.dataset.codes) seen.observe(card);
    }

    drawMaps(card) {
      const maps = card.querySelector(".maps");
      for (let depth = 0; depth < this.depth; depth++) {
        const canvas = this.drawMap(make("canvas"), card, depth);
        maps.append(make("figure", {}, canvas, make("figcaption", { textContent: `depth ${depth}` })));
      }
    }

    drawMap(canvas, card, depth) {
      const codes = this.codesOf(card), colours = this.palettes[depth];
      canvas.width = this.columns;
      canvas.height = this.rows;
      const pixels = new ImageData(this.columns, this.rows);
      const distinct = new Set();
      for (let position = 0; position < this.rows * this.columns; position++) {
        const code = codes[position * this.depth + depth];
        distinct.add(code);
        pixels.data.set(colours.subarray(3 * code, 3 * code + 3), 4 * position);
        pixels.data[4 * position + 3] = 255;
      }
      canvas.getContext("2d").putImageData(pixels, 0, 0);
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `Code map of depth ${depth}: ${distinct.size} different codes at ${this.rows * this.columns} positions`);
      return canvas;
    }

    // Positions of a card that have a code at a depth.
    positionsOf(card, depth, code) {
      const codes = this.codesOf(card), found = [];
      for (let position = 0, at = depth; at < codes.length; position++, at += this.depth) if (codes[at] === code) found.push(position);
      return found;
    }

    // The first of them, or -1.
    positionOf(card, depth, code) {
      const codes = this.codesOf(card);
      for (let at = depth; at < codes.length; at += this.depth) if (codes[at] === code) return (at - depth) / this.depth;
      return -1;
    }

    search(section) {
      const field = section.querySelector("input[type=search]"), status = section.querySelector("[role=status]");
      const texts = this.cards.map((card) => [...card.querySelectorAll("h3, .text")].map((part) => part.textContent).join("\n").toLowerCase());
      field.addEventListener("input", () => {
        const wanted = field.value.toLowerCase();
        let shown = 0;
        this.cards.forEach((card, number) => {
          card.hidden = !texts[number].includes(wanted);
          shown += card.hidden ? 0 : 1;
        });
        status.textContent = wanted ? `${shown} of ${this.cards.length} images` : "";
      });
    }
  }

  const explorer = {
    dialog: document.getElementById("explorer"),
    title: document.getElementById("explorer-title"),
    depthField: document.getElementById("explorer-depth"),
    picture: document.getElementById("explorer-picture"),
    map: document.getElementById("explorer-map"),
    said: document.getElementById("explorer-said"),
    others: document.getElementById("explorer-others"),

    async open(gallery, card, opener, position = 0) {
      if (this.gallery !== gallery) {
        this.depthField.replaceChildren(...gallery.palettes.map((_, depth) => make("option", { value: depth, textContent: depth })));
      }
      Object.assign(this, { gallery, card, position, opener: opener || this.opener });
      this.title.textContent = card.querySelector("h3").textContent;
      this.image = await loaded(card.querySelector("img"));
      if (!this.dialog.open) this.dialog.showModal();
      this.show();
      this.picture.focus();
    },

    show() {
      const { gallery, card, position } = this, { rows, columns } = gallery;
      const depth = Number(this.depthField.value), codes = gallery.codesOf(card);
      const mine = [...codes.slice(position * gallery.depth, (position + 1) * gallery.depth)];
      const same = gallery.positionsOf(card, depth, mine[depth]);
      const context = this.picture.getContext("2d"), edge = this.picture.width;
      context.drawImage(this.image, 0, 0, edge, edge);
      this.frame(context, edge, same, position);
      gallery.drawMap(this.map, card, depth);
      const small = this.map, large = make("canvas", { width: edge, height: edge }), drawn = large.getContext("2d");
      drawn.imageSmoothingEnabled = false;
      drawn.drawImage(small, 0, 0, edge, edge);
      this.frame(drawn, edge, same, position);
      small.width = small.height = edge;
      small.getContext("2d").drawImage(large, 0, 0);
      const holders = gallery.cards.filter((other) => other !== card && other.dataset.codes && other.querySelector("img") && gallery.positionOf(other, depth, mine[depth]) >= 0);
      const where = `Row ${Math.floor(position / columns) + 1} of ${rows}, column ${(position % columns) + 1} of ${columns}.`;
      this.said.textContent = `${where} Codes by depth: ${mine.join(", ")}. Code ${mine[depth]} of depth ${depth} stands at ${same.length} of ${rows * columns} positions here, and in ${holders.length} other images on this page.`;
      this.others.replaceChildren(...holders.slice(0, OTHERS).map((other) => this.link(other, depth, mine[depth])));
    },

    // White inside black, so that the frames stand out from any picture.
    frame(context, edge, positions, chosen) {
      const { rows, columns } = this.gallery, wide = edge / columns, tall = edge / rows;
      const box = (position, grow) => [(position % columns) * wide + 1 - grow, Math.floor(position / columns) * tall + 1 - grow, wide - 2 + 2 * grow, tall - 2 + 2 * grow];
      for (const position of positions) {
        for (const [colour, line] of [["#000", 3], ["#fff", 1]]) {
          context.strokeStyle = colour;
          context.lineWidth = line;
          context.strokeRect(...box(position, 0));
        }
      }
      context.lineWidth = 3;
      context.strokeStyle = "#000";
      context.strokeRect(...box(chosen, 3));
      context.strokeStyle = "#fff";
      context.strokeRect(...box(chosen, 0));
    },

    link(card, depth, code) {
      const { gallery } = this, { rows, columns } = gallery;
      const position = gallery.positionOf(card, depth, code);
      const row = Math.floor(position / columns), column = position % columns;
      const canvas = make("canvas", { width: PATCH, height: PATCH });
      const button = make("button", { type: "button", title: card.querySelector("h3").textContent }, canvas);
      button.setAttribute("aria-label", `${card.querySelector("h3").textContent}, row ${row + 1}, column ${column + 1}`);
      button.addEventListener("click", () => this.open(gallery, card, null, position));
      loaded(card.querySelector("img")).then((image) => {
        const wide = image.naturalWidth / columns, tall = image.naturalHeight / rows, context = canvas.getContext("2d");
        context.drawImage(image, (column - 1) * wide, (row - 1) * tall, 3 * wide, 3 * tall, 0, 0, PATCH, PATCH);
        for (const [colour, grow] of [["#000", 2], ["#fff", 1]]) {
          context.strokeStyle = colour;
          context.strokeRect(PATCH / 3 - grow, PATCH / 3 - grow, PATCH / 3 + 2 * grow, PATCH / 3 + 2 * grow);
        }
      });
      return make("li", {}, button);
    },

    move(position) {
      const last = this.gallery.rows * this.gallery.columns - 1;
      this.position = Math.min(Math.max(position, 0), last);
      this.show();
    },

    onKey(event) {
      const { columns } = this.gallery;
      const column = this.position % columns;
      const steps = { ArrowLeft: column ? -1 : 0, ArrowRight: column < columns - 1 ? 1 : 0, ArrowUp: this.position >= columns ? -columns : 0, ArrowDown: this.position < columns * (this.gallery.rows - 1) ? columns : 0, Home: -column, End: columns - 1 - column };
      if (!(event.key in steps)) return;
      event.preventDefault();
      this.move(this.position + steps[event.key]);
    },

    onPoint(event) {
      const place = event.currentTarget.getBoundingClientRect(), { rows, columns } = this.gallery;
      const column = Math.min(columns - 1, Math.floor(((event.clientX - place.left) / place.width) * columns));
      const row = Math.min(rows - 1, Math.floor(((event.clientY - place.top) / place.height) * rows));
      this.move(row * columns + column);
    },
  };

  // The picture of a lazy <img> that has perhaps never been in view.
  async function loaded(element) {
    const image = new Image();
    image.src = element.src;
    await image.decode();
    return image;
  }

  explorer.depthField.addEventListener("change", () => explorer.show());
  explorer.picture.addEventListener("keydown", (event) => explorer.onKey(event));
  explorer.picture.addEventListener("click", (event) => explorer.onPoint(event));
  explorer.map.addEventListener("click", (event) => explorer.onPoint(event));
  document.getElementById("explorer-close").addEventListener("click", () => explorer.dialog.close());
  explorer.dialog.addEventListener("close", () => explorer.opener && explorer.opener.focus());
  for (const section of document.querySelectorAll(".gallery")) new Gallery(section);
})();
