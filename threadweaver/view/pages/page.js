"use strict";
// What all pages share. Text from files is only ever set as text.

const $ = (id) => document.getElementById(id);
const read = (name) => JSON.parse($(`data-${name}`).textContent);

/** An element with a class, text and children. */
function make(tag, className, text, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined && text !== null) element.textContent = text;
  element.append(...children);
  return element;
}

/** An SVG element with attributes. */
function draw(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** int32s out of base64, little-endian as on every machine that runs a browser. */
function ints(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return new Int32Array(bytes.buffer);
}

const count = (n) => Math.round(n).toLocaleString("en");
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** A colour of the theme in use. */
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/**
 * Light and dark: as the system says until the button is pressed, then as was chosen.
 * `redraw` is called after every change, for what is drawn on canvases.
 */
function startTheme(redraw = () => {}) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = localStorage.getItem("threadweaver-theme");
  } catch {} // where files may keep nothing
  const apply = () => {
    const theme = chosen || (system.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    const other = theme === "dark" ? "Light" : "Dark";
    $("theme").textContent = other;
    $("theme").setAttribute("aria-label", `${other} theme`);
    redraw();
  };
  $("theme").onclick = () => {
    chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("threadweaver-theme", chosen);
    } catch {}
    apply();
  };
  system.onchange = apply;
  apply();
}

/**
 * A list of rows of one height, of which only those in view exist.
 * `fill(row, i)` fills an element for row i.
 */
class VirtualList {
  constructor(box, height, fill) {
    Object.assign(this, { box, height, fill, length: 0, shown: new Map() });
    this.sheet = make("div", "sheet");
    this.sheet.style.position = "relative";
    box.append(this.sheet);
    box.addEventListener("scroll", () => this.show(), { passive: true });
    new ResizeObserver(() => this.show()).observe(box);
  }

  /** Shows so many rows, all filled anew. */
  reset(length) {
    this.length = length;
    this.sheet.style.height = `${length * this.height}px`;
    this.sheet.replaceChildren();
    this.shown.clear();
    this.show();
  }

  show() {
    const spare = 6;
    const first = Math.max(0, Math.floor(this.box.scrollTop / this.height) - spare);
    const end = Math.min(this.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / this.height) + spare);
    for (const [i, row] of this.shown) {
      if (i < first || i >= end) {
        row.remove();
        this.shown.delete(i);
      }
    }
    for (let i = first; i < end; i++) {
      if (this.shown.has(i)) continue;
      const row = make("div", "row");
      row.style.cssText = `position:absolute;left:0;right:0;top:${i * this.height}px;height:${this.height}px`;
      this.fill(row, i);
      this.shown.set(i, row);
      this.sheet.append(row);
    }
  }

  /** Scrolls no further than needed to have row i and its neighbours in view. */
  reveal(i) {
    const spare = Math.min(2 * this.height, this.box.clientHeight / 4);
    const top = i * this.height - spare;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    const bottom = top + this.height + 2 * spare - this.box.clientHeight;
    if (bottom > this.box.scrollTop) this.box.scrollTop = bottom;
    this.show();
  }
}

/** The page is there to use; tests read the time. */
function ready() {
  requestAnimationFrame(() => setTimeout(() => {
    document.documentElement.dataset.ready = performance.now().toFixed(0);
  }));
}
