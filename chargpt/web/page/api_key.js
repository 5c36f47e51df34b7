/** Ask for the API key of the server, if it wants one. */

import { KeyError, keepKey } from "../engine/remote_engine.js";
import { element } from "./dom.js";

/** Do `work`; while the server wants another key, ask for it and try again. */
export async function withKey(work) {
  for (let asked = false; ; asked = true) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof KeyError)) throw error;
      keepKey(await askForKey(asked));
    }
  }
}

/** Show a form in place of the page; resolves to the key. */
function askForKey(again) {
  const main = document.querySelector("main");
  const trouble = element(
    "p.note",
    { id: "key-about" },
    again ? "This key was refused." : "It is kept in this tab only.",
  );
  const input = element("input", {
    id: "key",
    type: "password",
    required: true,
    autocomplete: "off",
    "aria-describedby": "key-about",
  });
  return new Promise((resolve) => {
    const submit = (event) => {
      event.preventDefault();
      door.replaceWith(main);
      document.documentElement.classList.remove("locked");
      resolve(input.value.trim());
    };
    const form = element(
      "form.key",
      { submit },
      element("label", { for: "key" }, "This server wants an API key"),
      element("div.actions", {}, input, element("button.main", { type: "submit" }, "Open")),
      trouble,
    );
    const door = element("main", {}, form);
    main.replaceWith(door);
    document.documentElement.classList.add("locked");
    input.focus();
  });
}
